"""The newsletter of the example, which people copy: who gets it, and how often."""

from collections import Counter
from functools import partial

from harness import faults
from harness.mails import NEWSLETTER, Mails
from harness.project import wait_for

on_one = partial(faults.stacks, ["redis"], ["prefork"], plain="plain-newsletter-")
CLICK = """
for click in range(clicks):
    send_newsletter.delay(newsletter.pk)
result = newsletter.pk
"""
WAITING = """
from orders.models import Recipient
result = Recipient.objects.filter(newsletter=newsletter, sent_at=None).count()
"""


def send(stack, mails, count, clicks=1):
    """Let a worker send a newsletter. Return how often each recipient got it, when all is done."""
    worker = stack.replace_worker("", **mails.variables)
    newsletter = stack.ask(NEWSLETTER + CLICK, count=count, clicks=clicks)
    if mails.count < count:
        wait_for(lambda: len(mails.received) == mails.count)
        worker.kill()
        mails.proceed.set()
        worker.start()
    wait_for(lambda: not stack.ask(WAITING, newsletter=newsletter))
    worker.stop()  # after the emails that it was sending
    return Counter(int(to.split("@")[0]) for to in mails.received)


@faults.either(on_one(), on_one(sqlite=True))
def test_two_clicks_send_one_email_to_each_recipient(stack):
    with Mails() as mails:
        assert send(stack, mails, 3000, clicks=2) == dict.fromkeys(range(3000), 1)


@on_one()
def test_a_killed_worker_leaves_out_nobody_but_the_one_whose_email_it_was_sending(stack):
    with Mails(count=150) as mails:
        received = send(stack, mails, 300)
    assert set(received.values()) == {1}
    assert len(received) >= 299

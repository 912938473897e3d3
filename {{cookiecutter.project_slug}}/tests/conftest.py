from smtplib import SMTPDataError, SMTPRecipientsRefused

import pytest
from django.core.mail.backends.locmem import EmailBackend


@pytest.fixture
def mail_errors(monkeypatch):
    """The errors of the mail server: each address has a list, and each attempt raises the next."""
    send, errors = EmailBackend.send_messages, {}

    def send_messages(self, messages):
        [to] = messages[0].to
        if errors.get(to):
            raise errors[to].pop(0)
        return send(self, messages)

    monkeypatch.setattr(EmailBackend, "send_messages", send_messages)
    return errors


@pytest.fixture
def refused(mail_errors):
    """Two addresses that the mail server refuses for good, the second one after DATA."""
    mail_errors["1@example.com"] = [SMTPRecipientsRefused({"1@example.com": (550, b"unknown")})]
    mail_errors["3@example.com"] = [SMTPDataError(554, b"not here")]
    return list(mail_errors)

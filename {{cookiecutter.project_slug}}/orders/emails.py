import logging
from smtplib import SMTPRecipientsRefused

from django.core.mail import get_connection, send_mail

logger = logging.getLogger(__name__)


def send_to_each(recipients, newsletter):
    """Send it over one connection. A refused address must not keep the others from getting it.

    It is not tried again, even if the refusal was temporary: others of its chunk would get it twice.
    """
    subject, body = newsletter.subject, newsletter.body
    with get_connection() as connection:
        for to in recipients:
            try:
                send_mail(subject, body, None, [to.email], connection=connection)
            except SMTPRecipientsRefused as error:
                logger.warning("%s", error)

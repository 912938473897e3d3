import logging
from smtplib import SMTPRecipientsRefused

from django.core.mail import get_connection, send_mail

logger = logging.getLogger(__name__)


def send_to_each(recipients, newsletter):
    """Send the newsletter over one connection. A refused address must not stop the others.

    Even a temporary refusal is not retried: the rest of the chunk would get the email again.
    """
    subject, body = newsletter.subject, newsletter.body
    with get_connection() as connection:
        for to in recipients:
            try:
                send_mail(subject, body, None, [to.email], connection=connection)
            except SMTPRecipientsRefused as error:
                logger.warning("%s", error)

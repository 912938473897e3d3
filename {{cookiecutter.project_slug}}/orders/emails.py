import logging
from smtplib import SMTPDataError, SMTPRecipientsRefused

from django.core.mail import send_mail

logger = logging.getLogger(__name__)


def send_email(to, subject, body, connection=None):
    """Only log an email that the mail server refuses for good: a retry would be useless."""
    try:
        send_mail(subject, body, None, [to], connection=connection)
    except (SMTPDataError, SMTPRecipientsRefused) as error:
        [(code, answer)] = getattr(error, "recipients", {to: error.args}).values()
        if code < 500:
            raise
        logger.warning("email to %s refused: %s %s", to, code, answer)

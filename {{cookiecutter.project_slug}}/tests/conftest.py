from smtplib import SMTPRecipientsRefused

import pytest
from django.core.mail.backends.locmem import EmailBackend


@pytest.fixture
def refused(monkeypatch):
    """An address that the mail server refuses."""
    send, refused = EmailBackend.send_messages, "1@example.com"

    def send_messages(self, messages):
        if messages[0].to == [refused]:
            raise SMTPRecipientsRefused({refused: (550, b"no such user")})
        return send(self, messages)

    monkeypatch.setattr(EmailBackend, "send_messages", send_messages)
    return refused

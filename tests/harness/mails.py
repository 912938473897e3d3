"""A newsletter, and a mail server for tests."""

import re
import socketserver
import threading

# Stores a newsletter to so many recipients.
NEWSLETTER = """
from orders.models import Newsletter, Recipient
from orders.tasks import send_newsletter
newsletter = Newsletter.objects.create(subject="News", body="It works.")
emails = [f"{number}@example.com" for number in range(count)]
Recipient.objects.bulk_create(Recipient(newsletter=newsletter, email=email) for email in emails)
"""


def mails(project):
    """Return all mails that the project sent in development."""
    return "".join(file.read_text() for file in project.glob(".data/mail/*"))


class Mails(socketserver.ThreadingTCPServer):
    """Records the recipients of mails. Accepts `count` mails, and more once `proceed` is set."""

    daemon_threads = True

    def __init__(self, count=10**9):
        super().__init__(("127.0.0.1", 0), Handler)
        self.count, self.proceed = count, threading.Event()
        self.variables = {
            "EMAIL_BACKEND": "django.core.mail.backends.smtp.EmailBackend",
            "EMAIL_HOST": "127.0.0.1",
            "EMAIL_PORT": self.server_address[1],
            "EMAIL_USE_TLS": "False",
        }
        self.received = []
        threading.Thread(target=self.serve_forever, args=[0.05], daemon=True).start()

    def __exit__(self, *exc_info):
        self.proceed.set()
        self.shutdown()
        super().__exit__(*exc_info)


class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        self.reply("220 ready")
        recipient = ""
        for line in self.rfile:
            word = line[:4].upper().decode()
            if word == "RCPT":
                recipient = re.search(rb"<(.+)>", line)[1].decode()
            if word == "DATA":
                if len(self.server.received) >= self.server.count:
                    self.server.proceed.wait()
                self.reply("354 go on")
                while (end := self.rfile.readline()) not in (b".\r\n", b""):
                    pass
                if not end:  # the sender has died
                    return
            if word == "DATA":
                self.server.received.append(recipient)
            self.reply("221 bye" if word == "QUIT" else "250 fine")

    def reply(self, text):
        self.wfile.write(f"{text}\r\n".encode())

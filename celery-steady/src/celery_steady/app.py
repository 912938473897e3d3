"""`from celery_steady import Celery`: Celery's app, with other defaults. See defaults.py."""

import re
from collections.abc import Mapping

from celery.app import utils

from celery_steady import defaults, rabbitmq, results, transports

HIDDEN = re.compile(f"LOCATION|BASIC_AUTH|DSN|{utils.HIDDEN_SETTINGS.pattern}", re.IGNORECASE)
PASSWORD = re.compile(r"(?<=://)[^/\s?#]*:[^/\s]*(?=@)")  # with its user


class Settings(utils.Settings):
    """What `celery report`, `celery inspect conf` and Flower print: with the passwords in all settings masked."""

    def table(self, with_defaults=False, censored=True):
        shown = super().table(with_defaults, censored)
        return mask(shown) if censored else shown


def mask(value, key=""):
    if HIDDEN.search(str(key)) and value:
        return "********"
    if isinstance(value, Mapping):
        return {key: mask(each, key) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [mask(each) for each in value]
    # A text may be another class, such as Django's lazy ones.
    return PASSWORD.sub("********", str(value)) if isinstance(value, str) else value


class Celery(rabbitmq.Celery):
    is_steady = True
    amqp_cls = "celery_steady.transports:AMQP"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.on_after_configure.connect(self._set_defaults, weak=False)
        object.__setattr__(self._conf, "__class__", Settings)  # an assignment would be a setting
        if self.configured:  # a subclass's on_init() has read a setting
            self._set_defaults(self.conf)

    def default_settings(self):
        """Return the settings that differ from Celery's. A subclass may return others."""
        return defaults.everywhere()

    def _set_defaults(self, source, **kwargs):
        # Not add_defaults(): with a namespace, Celery 5.7 prefers those to the project's settings.
        defaults.set_defaults(source, self.default_settings())
        object.__setattr__(source, "__class__", Settings)

    def connection_for_write(self, url=None, transport_options=None, **kwargs):
        ours = defaults.sending(transports.kind(url or self.conf.broker_write_url))
        theirs = {**self.conf.broker_transport_options, **(transport_options or {})}
        options = defaults.merge(ours, theirs)
        return super().connection_for_write(url, transport_options=options, **kwargs)

    def _get_backend(self):
        defaults.for_results(self)
        kind, url = results.by_url(self)
        return kind(app=self, url=url)

    def bugreport(self):
        """Return what `celery report` prints, and the defaults."""
        shown = "\n".join(f"{name}: {value!r}" for name, value in defaults.shown(self).items())
        return f"{super().bugreport()}\ncelery-steady's defaults:\n\n{shown}\n"

from rest_framework import exceptions, parsers


class Parser(parsers.JSONParser):
    """Answers 400 instead of 500 if a body is nested too deeply to be parsed."""

    def parse(self, *args, **kwargs):
        try:
            return super().parse(*args, **kwargs)
        except RecursionError:
            raise exceptions.ParseError("Nested too deeply.") from None

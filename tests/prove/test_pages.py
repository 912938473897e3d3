"""The output's pages can be followed: their code runs as it stands there."""

from harness.bake import DEFAULTS
from harness.outputs import outputs
from harness.pages import read_pages
from harness.reader import FOLLOWED, Reader, follow


@outputs(*({**DEFAULTS, **answers} for answers in FOLLOWED))
def test_a_reader_can_follow_the_pages(broker, project, database, tmp_path):
    """The README's first job and its test, then what docs/ adds to them."""
    follow(Reader(project, tmp_path, **broker), read_pages(project))

"""The pages of the template and of the library as a site, for `make site`."""

project = "OWNER/REPO"
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*", "tests/*.md", "templates/*.md", "durable-jobs/*.md"]
include_patterns += ["celery-steady/*.md", "celery-steady/docs/*.md", "durable-jobs/docs/*"]
exclude_patterns = ["AGENTS.md"]
extensions = ["myst_parser", "sphinxcontrib.mermaid"]
myst_heading_anchors = 3
myst_fence_as_directive = ["mermaid"]  # as on GitHub

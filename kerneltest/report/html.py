"""The HTML report: one self-contained file."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from kerneltest.model import RunRecord

TEMPLATE = "report.html.jinja"


def html(run: RunRecord) -> str:
    """Render the run. Everything that comes from outside is escaped: a kernel's name or a library's text is no markup."""
    environment = Environment(
        loader=PackageLoader("kerneltest.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(run=run)

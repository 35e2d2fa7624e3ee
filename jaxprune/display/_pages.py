"""Pages: one HTML file that needs nothing else, from a Jinja2 template.

Templates lie in ``templates``; those of a caller extend ``page.html.jinja`` and take
their parts from ``parts.html.jinja``. Whatever is no markup is escaped, there are no
scripts, and nothing is fetched.
"""

import re
from pathlib import Path
from typing import Any

from jaxprune.core._extras import needing
from jaxprune.core._kept import quantity

TEMPLATES = Path(__file__).with_name("templates")


def write_page(
    path: str | Path,
    template: str,
    values: dict[str, Any],
    folder: str | Path | None = None,
) -> None:
    """Writes a page, whole or not at all.

    Args:
        path: the HTML file.
        template: name of the template.
        values: what it shows: numbers, text and markup, such as of `as_svg`.
        folder: where the template lies, if it is none of jaxprune's.

    Raises:
        jinja2.UndefinedError: if the template asks for a value that is not there.
        ModuleNotFoundError: if jinja2 is missing.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "page.html")
        >>> write_page(path, "page.html.jinja", {"title": "1 < 2"})
        >>> "<h1>1 &lt; 2</h1>" in path.read_text()
        True
    """
    with needing("reports", "report"):
        import jinja2
    folders = [TEMPLATES] if folder is None else [folder, TEMPLATES]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([str(each) for each in folders]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"quantity": quantity, "breakable": _breakable}
    page = environment.get_template(template).render(values)
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file, {path}/x.html")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.tmp")
    try:
        aside.write_text(page, "utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _breakable(name: str) -> Any:
    """A name that may go on in the next line after its slashes and underscores."""
    import markupsafe

    return markupsafe.Markup("<wbr>").join(re.split(r"(?<=[/_])", name))

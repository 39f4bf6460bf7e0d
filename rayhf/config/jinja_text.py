"""Reading of jinja templates in configs, without rendering them."""

from __future__ import annotations

import jinja2
import jinja2.meta


def variables_of(source: str) -> set[str]:
    """Return the variables that a template reads.

    Raises ValueError of one line where it is not valid.
    """
    try:
        return jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(source))
    except jinja2.TemplateSyntaxError as error:
        message = " ".join(str(error.message).split())
        raise ValueError(f"line {error.lineno}: {message}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None

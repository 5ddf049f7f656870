"""An extension of griffe, for the site: the section "Example" of a docstring is set as code."""

import re
from typing import Any

from griffe import Docstring, Extension, Object


class Examples(Extension):
    """Give the section the name by which griffe knows that its lines are a session of Python."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            old = obj.docstring
            text = re.sub(r"^Example:$", "Examples:", old.value, flags=re.MULTILINE)
            obj.docstring = Docstring(
                text, lineno=old.lineno, endlineno=old.endlineno, parent=old.parent, parser=old.parser,
                parser_options=old.parser_options,
            )  # fmt: skip

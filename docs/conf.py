"""Sphinx builds the documentation with this: `make docs`."""

from __future__ import annotations

import cpupool

project = "cpupool"
author = "The cpupool authors"
copyright = "2026, The cpupool authors"
version = release = cpupool.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "benchmarks/*.md"]  # the latter are included elsewhere
html_theme = "furo"
html_title = f"cpupool {release}"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_default_options = {"member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Cancellation"]

# No intersphinx, so that the build needs no network: what the standard library and anyio define is named here.
nitpicky = True
nitpick_ignore_regex = [
    (
        r"py:.+",
        r"(anyio|asyncio|collections\.abc|concurrent\.futures|datetime|multiprocessing|os|pathlib|pickle|re|typing)(\..+)?",
    ),
    (r"py:.+", r"(fastapi|starlette)\..+"),
    (
        r"py:.+",
        r"(AbstractAsyncContextManager|APIRouter|ClientDisconnect|CollectorRegistry|FastAPI|HTTPConnection|Request|Response|Router?)",
    ),
    (r"py:class", r"(cpupool\.asgi\.)?Application"),  # any ASGI application
    (r"py:class", r"(cpupool\._supervisor\.)?Health"),  # three words
    (r"py:class", r"BaseContext|Future|Path|Self"),  # imported for annotations only, so that autodoc sees the bare name
    (r"py:class", r"collections\.Counter|dict\[str"),  # dataclass defaults, which autodoc takes apart
    (r"py:class", r"(cpupool\._\w+\.)?[PRST](\.args|\.kwargs)?"),  # type variables
    (r"py:class", r"(cpupool\._settings\.)?Unset"),  # the default of an option; users leave it out
]

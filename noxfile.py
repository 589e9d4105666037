"""Sessions in environments of their own: `nox -l` lists them, `nox -s docs` runs one.

`tests` runs on every Python that is promised and found; `lowest` with the oldest versions of what
fxfuse computes with.
"""

import nox

nox.options.sessions = ["lint", "tests", "docs", "package"]
nox.options.error_on_missing_interpreters = False
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run the tests; name files to run these alone."""
    session.install(".[test]")
    session.run("pytest", *session.posargs)


@nox.session(python="3.10")
def lowest(session: nox.Session) -> None:
    """Run the tests with the lowest versions that `pyproject.toml` promises."""
    project = nox.project.load_toml("pyproject.toml")["project"]
    promised = [d.replace(">=", "==") for d in project["dependencies"] if ">=" in d]
    session.install(".[test]", *promised)
    session.run("pytest", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Hold style and types."""
    session.install(".[test]")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation, warnings as errors, and check its links."""
    session.install(".[docs]")
    session.run("sphinx-build", "-q", "-W", "--keep-going", "docs", "build/docs")
    session.run("python", "docs/check_links.py", "build/docs")


@nox.session
def package(session: nox.Session) -> None:
    """Build the distributions and check them."""
    session.install("build", "twine")
    session.run("python", "-m", "build", "--outdir", "build/dist")
    session.run("twine", "check", "--strict", "build/dist/*", external=False)

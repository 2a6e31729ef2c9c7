"""Pages about the package, and the script that draws their figures (`python -m docs.figures`)."""

"""Everything that a serious run needs and no reader does: see harness/README.md."""

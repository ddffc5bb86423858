"""Everything a serious run needs and no reader does: see README.md in this folder."""

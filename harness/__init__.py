"""Everything that a serious run needs and no reader does: nothing in here is needed to understand the method."""

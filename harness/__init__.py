"""Everything that a serious run needs and no reader does: no part of the method is in here."""

"""Import paths that users know, re-exported from pixtune. Nothing else is here."""

"""Import paths that users know, re-exported from pixtune. Nothing else lives here."""

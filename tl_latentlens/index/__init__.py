"""A bank, or several of one model, made searchable on a device."""

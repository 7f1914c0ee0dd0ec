"""Every setting: its type, default and help text, and where its value comes from."""

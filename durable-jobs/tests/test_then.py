"""self.then(): the next step that a body names is stored with its success, once."""

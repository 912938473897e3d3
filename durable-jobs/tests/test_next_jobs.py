"""self.enqueue_next(): a next job is stored with the success of its job, once."""

            if keeper is None:
                keeper = start_new_thread(keep, ())

            if keeper is None:  # not earlier: threads do not survive the fork of a prefork child
                keeper = threading.Thread(target=keep, name="leases", daemon=True)
                keeper.start()

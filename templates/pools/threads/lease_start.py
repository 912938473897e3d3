            if keeper is None:
                keeper = threading.Thread(target=keep, name="leases", daemon=True)
                keeper.start()

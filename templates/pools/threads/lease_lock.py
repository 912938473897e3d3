lock = threading.Lock()
stop_at = float("inf")

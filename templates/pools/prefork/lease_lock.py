lock = threading.Lock()

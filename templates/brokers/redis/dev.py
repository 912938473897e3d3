def start_broker():
    """Start a broker for development where CELERY_BROKER_URL points to, unless one answers there.

    Returns the processes that were started. Exits if the URL points to another machine.
    """
    url = urlsplit(settings.CELERY_BROKER_URL)
    port = url.port or 6379
    if answers(port, url.hostname):
        return []
    if url.hostname not in ("127.0.0.1", "localhost"):
        sys.exit(f"No Redis answers at {url.hostname}:{port}, see CELERY_BROKER_URL in .env")
    if server := shutil.which("redis-server") or shutil.which("valkey-server"):
        print(f"Starting {server} on port {port}; it keeps its data in .broker/")
        Path(".broker").mkdir(exist_ok=True)
        options = f"--bind {HOST} --port {port} --dir .broker --appendonly yes --loglevel warning"
        return [subprocess.Popen([server, *options.split()], start_new_session=True)]
    print(f"Starting fakeredis on port {port}; it keeps messages in memory, which does for a start")
    command = [sys.executable, "-c", f"import dev; dev.serve_fakeredis({port})"]
    return [subprocess.Popen(command, start_new_session=True)]


def serve_fakeredis(port):
    from fakeredis import TcpFakeServer
    from fakeredis._clients._tcp_server import TCPFakeRequestHandler
    from redis import ResponseError

    class Handler(TCPFakeRequestHandler):
        disable_nagle_algorithm = True  # else each transaction takes 44 ms

        def setup(self):
            super().setup()
            read = self.current_client.read_response

            def read_response():
                try:
                    return read()
                except ResponseError as error:  # an answer, and no reason to hang up
                    return error

            self.current_client.read_response = read_response

    server = TcpFakeServer((HOST, port))
    server.RequestHandlerClass = Handler
    server.daemon_threads = True
    server.serve_forever()

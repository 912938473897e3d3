def start_redis():
    """Start a Redis for development wherever the settings point to and none answers.

    Returns the processes that were started. Exits if that is on another machine.
    """
{% set variables = ["CELERY_BROKER_URL" if broker.server == "redis", "CELERY_RESULT_BACKEND" if results.server == "redis"] %}
    urls = [{% for variable in variables if variable %}{{ "" if loop.first else ", " }}urlsplit(settings.{{ variable }}){% endfor %}]
    places = {(url.port or 6379, url.hostname) for url in urls}
    missing = [place for place in places if not answers(*place)]
    for port, host in missing:
        if host not in ("127.0.0.1", "localhost"):
            sys.exit(f"No Redis answers at {host}:{port}, see .env")
    return [start_redis_at(port) for port, _ in missing]


def start_redis_at(port):
    if server := shutil.which("redis-server") or shutil.which("valkey-server"):
        folder = Path(".data", str(port))
        folder.mkdir(parents=True, exist_ok=True)
        print(f"Starting {server} on port {port}; it keeps its data in {folder}/")
        options = f"--bind {HOST} --port {port} --dir {folder} --appendonly yes --loglevel warning"
        command = [server, *options.split()]
    else:
        print(f"Starting fakeredis on port {port}; it keeps data in memory, for a first look")
        command = [sys.executable, "-c", f"import dev; dev.serve_fakeredis({port})"]
    server = subprocess.Popen(command, start_new_session=True)
    while server.poll() is None and not answers(port):
        time.sleep(0.1)
    return server


def serve_fakeredis(port):
    from fakeredis._clients import _tcp_server
    from redis import ResponseError

    class Connection(_tcp_server.FakeRedisConnection):
        def read_response(self):
            try:
                return super().read_response()
            except ResponseError as error:  # an answer, and no reason to hang up
                return error

    _tcp_server.FakeRedisConnection = Connection
    # Else each transaction takes 44 ms.
    _tcp_server.TCPFakeRequestHandler.disable_nagle_algorithm = True
    _tcp_server.TcpFakeServer((HOST, port)).serve_forever()

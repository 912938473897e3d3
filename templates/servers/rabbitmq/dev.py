def start_rabbitmq():
    """Start nothing: RabbitMQ has no stand-in. Exits if none answers where the settings say."""
    url = urlsplit(settings.CELERY_BROKER_URL)
    port = url.port or {"amqps": 5671}.get(url.scheme, 5672)
    if not answers(port, url.hostname):
        sys.exit(
            f"No RabbitMQ answers at {url.hostname}:{port}, see .env. On this machine, start one:\n"
            "    docker run --detach --publish 127.0.0.1:5672:5672 rabbitmq:4\n"
            "or: sudo apt install rabbitmq-server"
        )
    return []

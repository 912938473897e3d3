def start_aws():
    """Start a stand-in for AWS where AWS_ENDPOINT_URL points to and none answers."""
    url = urlsplit(os.environ.get("AWS_ENDPOINT_URL", ""))
    if url.hostname not in ("127.0.0.1", "localhost") or answers(url.port):
        return []
    print(f"Starting moto, a stand-in for AWS, on port {url.port}; it keeps data in memory")
    command = [sys.executable, "-m", "moto.server", "--port", str(url.port)]
    server = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    while server.poll() is None and not answers(url.port):
        time.sleep(0.1)
    prepare_aws()
    return [server]


def prepare_aws():
    """Create what the stand-in lacks."""
{% if broker.server == "aws" %}
    create_queues()
{% endif %}
{% if results.server == "aws" %}
    from config.celery import app

    app.backend.client  # noqa: B018  creates the table
{% endif %}
{% if broker.server == "aws" %}


def create_queues():
    """Create the queues of the settings, or set their attributes anew; README.md says what for."""
    import boto3

    sqs = boto3.client("sqs")
    slug = "{{ cookiecutter.project_slug }}"
    dead = sqs.create_queue(QueueName=f"{slug}-dead")["QueueUrl"]
    found = sqs.get_queue_attributes(QueueUrl=dead, AttributeNames=["QueueArn"])["Attributes"]
    redrive = {"deadLetterTargetArn": found["QueueArn"], "maxReceiveCount": 10}
    retention = {"MessageRetentionPeriod": str(14 * 24 * 60 * 60)}
    timeout = {"VisibilityTimeout": str(settings.SQS_VISIBILITY_TIMEOUT)}
    attributes = {**retention, **timeout, "RedrivePolicy": json.dumps(redrive)}
    sqs.set_queue_attributes(QueueUrl=dead, Attributes=retention)
    for name in settings.SQS_QUEUES:
        queue = sqs.create_queue(QueueName=f"{slug}-{name}")["QueueUrl"]
        sqs.set_queue_attributes(QueueUrl=queue, Attributes=attributes)
{% endif %}

"""Messages that Redis or RabbitMQ gave up, in the queue `dead-letters`."""

from kombu import Queue

from celery_steady.messages import send_again


def send_back(app, name="dead-letters"):
    """Send each dead letter to its queue again. Return how many there were.

    For example, when the code that killed its workers is fixed. With SQS, use
    `aws sqs start-message-move-task`.
    """
    count = 0
    with app.connection_for_write() as connection:
        producer = connection.Producer()
        queue = Queue(name)(producer.channel)
        while message := queue.get():
            deaths = message.headers.get("x-death")  # of RabbitMQ
            send_again(producer, message, message.headers, queue=deaths and deaths[0]["queue"])
            message.ack()
            count += 1
    return count

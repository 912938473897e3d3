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
            headers, place = message.headers, message.delivery_info
            if deaths := headers.get("x-death"):  # of RabbitMQ
                place = {"exchange": "", "routing_key": deaths[0]["queue"]}
            place = {key: place[key] for key in ("exchange", "routing_key")}
            send_again(producer, message, headers, **place)
            message.ack()
            count += 1
    return count

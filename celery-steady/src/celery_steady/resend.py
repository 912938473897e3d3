"""Sends a message again that was received."""

from kombu.compression import compress

# Properties of the delivery, and what has an argument of its own
OWN = {
    "application_headers",
    "body_encoding",
    "content_encoding",
    "content_type",
    "deliveries",
    "delivery_info",
    "delivery_tag",
    "priority",
    "user_id",  # RabbitMQ refuses that of another user
}


def send_again(channel, message, headers, queue=None):
    """Send a message as it came, with these headers: to this queue, or where it was sent to.

    If the broker confirms what it has stored, wait for that. If it has no queue for the message, that's an
    error.
    """
    info = message.delivery_info
    place = {"exchange": info["exchange"], "routing_key": info["routing_key"]}
    if queue:
        place = {"exchange": "", "routing_key": queue}
    body = message.body
    if compression := message.headers.get("compression"):  # kombu has decompressed it
        body, _ = compress(body, compression)
    again = channel.prepare_message(
        body,
        priority=message.properties.get("priority"),
        content_type=message.content_type,
        content_encoding=message.content_encoding,
        headers=headers,
        properties={key: value for key, value in message.properties.items() if key not in OWN},
    )
    publish = getattr(channel, "basic_publish_confirm", channel.basic_publish)
    publish(again, mandatory=True, **place)

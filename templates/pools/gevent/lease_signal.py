{% include "pools/threads/lease_signal.py" %}

{% include "pools/threads/lease_stop.py" %}



@register(deploy=True)
def check_redis(app_configs, **kwargs):
{% if results.server == "redis" %}
    names = ["CELERY_BROKER_URL", "CELERY_RESULT_BACKEND", "CACHE_URL"]
{% else %}
    names = ["CELERY_BROKER_URL", "CACHE_URL"]
{% endif %}
    urls = {name: getattr(settings, name, None) or os.environ.get(name, "") for name in names}
    used_by = {}
    for name, url in urls.items():
        parts = urlsplit(url)
        if parts.scheme == "rediss" and not re.search(r"ssl_cert_reqs=(CERT_)?required", url, re.I):
            yield Warning(
                f"The TLS certificate of the server of {name} is not checked.",
                hint="Add ?ssl_cert_reqs=required, and ssl_ca_certs= for an authority of your own.",
                id="jobs.W001",
            )
        place = parts.hostname, parts.port or 6379, parts.path.strip("/") or "0"
        if url.startswith("redis") and used_by.setdefault(place, name) != name:
            yield Warning(
                f"{used_by[place]} and {name} are one database: to clear one of them empties both.",
                hint="Give each a database of its own, and the cache a server of its own.",
                id="jobs.W002",
            )

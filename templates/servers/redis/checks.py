

def redis_urls():
    """Return the Redis databases in use, {variable: URL}."""
{% if results.server == "redis" %}
    names = ["CELERY_BROKER_URL", "CELERY_RESULT_BACKEND", "CACHE_URL"]
{% else %}
    names = ["CELERY_BROKER_URL", "CACHE_URL"]
{% endif %}
    urls = {name: getattr(settings, name, None) or os.environ.get(name, "") for name in names}
    return {name: url for name, url in urls.items() if url.startswith("redis")}


@register(deploy=True)
def check_tls(app_configs, **kwargs):
    for name, url in redis_urls().items():
        if url.startswith("rediss:") and not re.search("ssl_cert_reqs=(CERT_)?required", url, re.I):
            yield Warning(
                f"The TLS certificate of the server of {name} is not checked.",
                hint="Add ?ssl_cert_reqs=required, and ssl_ca_certs= for an authority of your own.",
                id="jobs.W001",
            )


@register(deploy=True)
def check_shared_database(app_configs, **kwargs):
    def place(url):
        parts = urlsplit(url)
        return parts.hostname, parts.port or 6379, parts.path.strip("/") or "0"

    for (name, url), (other, other_url) in combinations(redis_urls().items(), 2):
        if place(url) == place(other_url):
            yield Warning(
                f"{name} and {other} are one database: to clear one of them empties both.",
                hint="Give each a database of its own, and the cache a server of its own.",
                id="jobs.W002",
            )

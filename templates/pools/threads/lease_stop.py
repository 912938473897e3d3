            if time.monotonic() >= stop_at:
                rows(current).requeue()
                for request in list(active_requests):  # plain tasks go back to the broker
                    request.reject(requeue=True)
                os._exit(0)

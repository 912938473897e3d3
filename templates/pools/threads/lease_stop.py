            if time.monotonic() >= stop_at:
                rows(current).requeue()
                os._exit(0)

-- Renews the leases of a worker's messages.
-- KEYS: unacked_index, unacked_leases, unacked_renewed. ARGV: seconds of a lease, delivery tags.
-- The hash unacked_renewed has times: `at`, of the last renewal by any worker; `since`, of the first one
-- after a gap, or after the clock was set back; and the longest lease, with its last renewal.
write_when_full()
local lease = tonumber(ARGV[1])
local old = redis.call('hmget', KEYS[3], 'at', 'since', 'longest', 'longest_at')
local at, since = tonumber(old[1] or 0), tonumber(old[2] or 0)
local longest, longest_at = tonumber(old[3] or lease), tonumber(old[4] or now)
if now < at or now - at > math.min(longest, 120) / 2 then
  since, longest_at = now, now
end
if lease >= longest or now - longest_at > longest then
  longest, longest_at = lease, now
end
redis.call('hset', KEYS[3], 'at', now, 'since', since, 'longest', longest, 'longest_at', longest_at)
for i = 2, #ARGV do
  redis.call('zadd', KEYS[1], 'xx', now + lease, ARGV[i])
  redis.call('zadd', KEYS[2], 'xx', now + lease, ARGV[i])
end

-- Lets a message that was taken wait until it is due.
-- KEYS: unacked, unacked_index, unacked_leases, countdowns. ARGV: delivery tag, message, time.
-- Returns 1 if it waits.
write_when_full()
if tonumber(ARGV[3]) > now and redis.call('hexists', KEYS[1], ARGV[1]) == 1 then
  redis.call('zadd', KEYS[4], ARGV[3], ARGV[2])
  redis.call('hdel', KEYS[1], ARGV[1])
  redis.call('zrem', KEYS[2], ARGV[1])
  redis.call('zrem', KEYS[3], ARGV[1])
  return 1
end

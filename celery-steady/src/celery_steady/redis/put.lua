-- Puts a message that was taken into lists.
-- KEYS: unacked, unacked_index, unacked_leases, and for each list its key and its bell.
-- ARGV: delivery tag, message, rpush to be the next one or lpush, how many entries a list may have or 0.
-- Returns how many old entries were deleted for it.
local deleted, most = 0, tonumber(ARGV[4])
write_when_full()
if redis.call('hexists', KEYS[1], ARGV[1]) == 1 then
  for i = 4, #KEYS, 2 do
    local length = redis.call(ARGV[3], KEYS[i], ARGV[2])
    if most > 0 and length > most then
      redis.call('ltrim', KEYS[i], 0, most - 1)
      deleted = deleted + length - most
    end
    ring(KEYS[i + 1])
  end
  redis.call('hdel', KEYS[1], ARGV[1])
  redis.call('zrem', KEYS[2], ARGV[1])
  redis.call('zrem', KEYS[3], ARGV[1])
end
return deleted

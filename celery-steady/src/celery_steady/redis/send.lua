-- Sends a message, or lets it wait until it is due. If Redis is full, nothing of it happens.
-- KEYS: countdowns, list, bell, and what else expires.
-- ARGV: message, time when it is due, milliseconds until the list, the bell and the others expire or 0.
if tonumber(ARGV[2]) > now then
  redis.call('zadd', KEYS[1], ARGV[2], ARGV[1])
else
  redis.call('lpush', KEYS[2], ARGV[1])
end
ring(KEYS[3])
if tonumber(ARGV[3]) > 0 then
  for i = 2, #KEYS do redis.call('pexpire', KEYS[i], ARGV[3]) end
end

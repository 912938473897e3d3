-- Moves countdowns to their list, a few at a time. KEYS: countdowns, list. Returns how many.
local items = redis.call('zrange', KEYS[1], 0, 99)
for _, item in ipairs(items) do
  redis.call('zrem', KEYS[1], item)
  redis.call('lpush', KEYS[2], item)
end
return #items

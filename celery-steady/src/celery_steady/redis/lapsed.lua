-- Finds messages of dead workers. For one lease, nobody else gets them.
-- KEYS: unacked, unacked_index, unacked_leases, unacked_renewed.
-- ARGV: seconds of a lease, seconds after which the messages of stock workers come again.
-- Returns delivery tags. A lease counts, whatever the lease of the worker is that looks. After a time
-- when nobody could renew, because Redis was away or its clock has jumped, all get time to do so.
local lease, tags = tonumber(ARGV[1]), {}
write_when_full()
local function claim(tag)
  if redis.call('hexists', KEYS[1], tag) == 1 then
    redis.call('zadd', KEYS[2], now + lease, tag)
    redis.call('zadd', KEYS[3], now + lease, tag)
    table.insert(tags, tag)
  else
    redis.call('zrem', KEYS[2], tag)
    redis.call('zrem', KEYS[3], tag)
  end
end
local function find(key, first, last)
  return ipairs(redis.call('zrangebyscore', key, first, last, 'limit', 0, 10))
end

local times = redis.call('hmget', KEYS[4], 'at', 'since', 'longest')
if times[1] then
  local longest = tonumber(times[3] or lease) -- an older version has none
  local grace = math.min(longest, 120) / 2
  if now >= times[1] + 0 and now - times[1] <= grace and now - times[2] >= grace then
    for _, tag in find(KEYS[3], '-inf', now) do claim(tag) end
    -- Nobody has renewed these since the clock was set back.
    for _, tag in find(KEYS[3], '(' .. now + longest + 1, '+inf') do claim(tag) end
  end
end
for _, tag in find(KEYS[2], '-inf', now - ARGV[2]) do
  if not redis.call('zscore', KEYS[3], tag) then claim(tag) end
end
return tags

-- Takes a message and notes who has it: nothing can be lost between the two.
-- KEYS: unacked, unacked_index, unacked_leases, n lists, n sets of countdowns, bells. The lists are those
--   of the first priority, in the order of the bells, then those of the next one.
-- ARGV: number of queues, number of priorities, seconds after which to look again, seconds of a lease
--   (0: nobody will renew it), how a message begins that needs no note (or nothing), for each queue its
--   name as JSON (or nothing, if its messages are not acknowledged), numbers of the queues in their order
--   from 0, delivery tag.
-- Returns the seconds until a message is due, or 0 if there may be more now. If there is a message, also
--   its list, the message, and 1 if it was noted.
local queues, priorities = tonumber(ARGV[1]), tonumber(ARGV[2])
local wait, lease = tonumber(ARGV[3]), tonumber(ARGV[4])
local prefix, order, tag = ARGV[5], ARGV[#ARGV - 1], ARGV[#ARGV]
local n = queues * priorities
local lists, countdowns, bells = 4, 4 + n, 4 + 2 * n

-- unpack() takes fewer than 8,000 values.
local function call(command, first, last)
  local count = 0
  for i = first, last, 4000 do
    count = count + redis.call(command, unpack(KEYS, i, math.min(i + 3999, last)))
  end
  return count
end

if call('exists', lists, #KEYS) == 0 then return {tostring(wait)} end

local delays = call('exists', countdowns, bells - 1) > 0
if delays then
  write_when_full()
  for i = 0, n - 1 do
    local due = redis.call('zrangebyscore', KEYS[countdowns + i], '-inf', now, 'limit', 0, 10)
    for _, item in ipairs(due) do
      redis.call('lpush', KEYS[lists + i], item)
      redis.call('zrem', KEYS[countdowns + i], item)
    end
  end
end

-- The hash has what kombu writes: message, exchange, routing key. Without an exchange, the message can
-- only go back to this queue.
local function note(item, name)
  redis.call('hset', KEYS[1], tag, '[' .. item .. ', "", ' .. name .. ']')
  redis.call('zadd', KEYS[2], now + lease, tag)
  if lease > 0 then redis.call('zadd', KEYS[3], now + lease, tag) end
end

local function take()
  local positions = {}
  for position in order:gmatch('%d+') do table.insert(positions, tonumber(position)) end
  for priority = 0, priorities - 1 do
    for _, position in ipairs(positions) do
      local list, name = KEYS[lists + priority * queues + position], ARGV[6 + position]
      local item = redis.call('rpop', list)
      if item and (name == '' or (prefix ~= '' and item:sub(1, #prefix) == prefix)) then
        return {'0', list, item}
      elseif item then
        local noted, problem = pcall(note, item, name)
        if noted then return {'0', list, item, '1'} end
        redis.call('rpush', list, item)
        return type(problem) == 'table' and problem or redis.error_reply(problem)
      end
    end
  end
end

local answer = take()
if answer and (answer.err or call('exists', lists, countdowns - 1) > 0) then return answer end
if delays then
  for i = countdowns, bells - 1 do
    local next = redis.call('zrange', KEYS[i], 0, 0, 'withscores')[2]
    if next then wait = math.min(wait, next - now) end
  end
end
call('del', bells, #KEYS)
answer = answer or {}
answer[1] = tostring(wait)
return answer

-- Begins each script: Redis' clock, and a function that wakes a waiting worker.
local time = redis.call('time')
local now = time[1] + time[2] / 1000000
-- An entry of the list is enough for each worker that waits. Nobody may ever wait for it.
local function ring(bell)
  local length = redis.pcall('lpush', bell, '')
  if length == 1 then redis.call('expire', bell, 60) end
  if type(length) == 'number' and length > 100 then redis.call('ltrim', bell, 0, 99) end
end
-- A full Redis refuses commands that need memory, but only until a script has written.
local function write_when_full() redis.call('persist', KEYS[1]) end

-- Fenced writes of the stripe index. The epoch in KEYS[1] only grows; a call of an older epoch changes nothing.
-- KEYS[1]  epoch of the group       ARGV[1]  operation: put, delete, drop, purge, find, raise, lease or leave
-- KEYS[2]  and on: stripes          ARGV[2]  epoch of the caller (drop, purge, find: unused)
-- put:     ARGV[3..] pairs (shard number, entry), one for each stripe key; a stripe may be named more than once
-- delete:  whole stripes
-- drop:    ARGV[3..] pairs (shard number, owner): deletes the entry only if it still begins with owner
-- purge:   ARGV[3] what entries of a store begin with, ARGV[4] what those of its present life do: deletes all others of it
-- find:    what is known of each stripe, as MessagePack: a list for each key, of shard numbers and entries in turns
-- raise:   the group's epoch becomes ARGV[2] if it was less; returns {1, what it was}
-- lease:   KEYS[1] is the lease, ARGV[2] who wants it, for ARGV[3] ms, ARGV[4] whose it may be taken from; who has it now
-- leave:   KEYS[1] is the lease, ARGV[2] who gives it back
-- Returns {1, how many entries or stripes it touched}, or {0, the group's epoch} if the caller is fenced off.
local operation = ARGV[1]

if operation == 'lease' or operation == 'leave' then
  local holder = redis.call('GET', KEYS[1])
  if operation == 'leave' then
    return {1, holder == ARGV[2] and redis.call('DEL', KEYS[1]) or 0}
  end
  if holder and holder ~= ARGV[2] and holder ~= ARGV[4] then
    return {0, holder}
  end
  redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
  return {1, ARGV[2]}
end

if operation == 'raise' then
  local current = tonumber(redis.call('GET', KEYS[1]) or '0')
  if current < tonumber(ARGV[2]) then
    redis.call('SET', KEYS[1], ARGV[2])
  end
  return {1, current}
end

if operation == 'find' then
  local stripes = {}
  for i = 2, #KEYS do
    stripes[i - 1] = redis.call('HGETALL', KEYS[i])
  end
  return {1, cmsgpack.pack(stripes)}
end

if operation ~= 'drop' and operation ~= 'purge' then
  local current = tonumber(redis.call('GET', KEYS[1]) or '0')
  if tonumber(ARGV[2]) < current then
    return {0, current}
  end
end

local touched = 0
for i = 2, #KEYS do
  if operation == 'delete' then
    touched = touched + redis.call('UNLINK', KEYS[i])
  elseif operation == 'purge' then
    local store, owner = ARGV[3], ARGV[4]
    local shards = redis.call('HGETALL', KEYS[i])
    for j = 1, #shards, 2 do
      local entry = shards[j + 1]
      if string.sub(entry, 1, #store) == store and string.sub(entry, 1, #owner) ~= owner then
        touched = touched + redis.call('HDEL', KEYS[i], shards[j])
      end
    end
  else
    local number, value = ARGV[2 * i - 1], ARGV[2 * i]
    if operation == 'put' then
      redis.call('HSET', KEYS[i], number, value)
      touched = touched + 1
    else
      local entry = redis.call('HGET', KEYS[i], number)
      if entry and string.sub(entry, 1, #value) == value then
        touched = touched + redis.call('HDEL', KEYS[i], number)
      end
    end
  end
end
return {1, touched}

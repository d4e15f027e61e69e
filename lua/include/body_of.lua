-- The body of a record, which is what a game keeps of its members; see split_record.
local function body_of(record)
  local colon = record:find(':', 1, true)
  return record:sub(colon + 1 + record:sub(1, colon - 1))
end
